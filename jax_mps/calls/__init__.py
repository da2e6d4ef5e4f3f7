"""Custom calls by name: what the device, XLA's CPU client or Python can do with a target."""
