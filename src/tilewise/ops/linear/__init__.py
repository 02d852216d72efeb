"""The linear map: a product with a weight."""
