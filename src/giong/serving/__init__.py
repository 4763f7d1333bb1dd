"""The model process: loads the weights once and answers chats over a local socket (`giong.clients.model_socket`)."""
