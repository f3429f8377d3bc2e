"""A trained model in use: chat page, API, export."""
