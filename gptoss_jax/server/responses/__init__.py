"""OpenAI's Responses API over a chat: bodies and items in, items and events out, responses kept. Knows no model."""
