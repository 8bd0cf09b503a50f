"""Shows where a trained network spends its computation on a data set: pictures and a page."""
