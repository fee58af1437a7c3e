"""What people look at, made from plans and records."""
