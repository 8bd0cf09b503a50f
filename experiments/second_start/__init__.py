"""The second start of a run finds its programs compiled."""
