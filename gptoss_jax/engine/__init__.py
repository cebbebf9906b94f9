"""From a model and a prompt to new ids. Knows ids; knows no text and no files."""
