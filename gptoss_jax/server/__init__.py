"""An HTTP server that OpenAI's clients accept. Translates between JSON and a chat's events, no more."""
