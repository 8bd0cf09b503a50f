"""Where a trained network spends its thought on a data set: pictures, and a page that shows them."""
