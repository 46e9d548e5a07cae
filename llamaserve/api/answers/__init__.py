"""What answers look like, for the OpenAPI document alone: one module per resource. Nothing is serialised by these."""
