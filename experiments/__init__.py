"""One folder a claim: a script that measures it, and its result."""
