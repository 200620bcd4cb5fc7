"""Results as text, tables and HTML pages, rendered from plain data; nothing here measures anything."""
