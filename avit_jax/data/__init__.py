"""The path of an image: source -> host transform -> loader -> augmentation on the device."""
