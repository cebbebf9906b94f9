"""One gpt-oss model: its sizes, layers and forward pass. Knows no files, no mesh shape and no sampling."""
