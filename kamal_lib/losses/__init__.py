"""The papers' losses as functions of tensors; nothing here knows a network."""
