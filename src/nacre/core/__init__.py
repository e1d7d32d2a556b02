"""What the layers share: how an op is put together, checked, costed and described."""
