"""The way of an image: source -> host transforms -> loader -> device augmentation."""
