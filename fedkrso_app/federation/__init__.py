"""The round on the server, the nodes, and W on a client."""
