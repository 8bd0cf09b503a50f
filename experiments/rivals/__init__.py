"""Other ways to spend less on a picture, on the same network, to compare with."""
