"""One module a resource: handlers with their request and response models beside them."""
