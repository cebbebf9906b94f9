"""Both released checkpoint layouts, in and out: names, bytes and dtypes. Knows no text and runs no model."""
