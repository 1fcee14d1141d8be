"""The registry: registering policies, promoting them."""
