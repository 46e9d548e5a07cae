"""What `make chaos` consists of: a server, its clients, faults, and checks of what came of them."""
