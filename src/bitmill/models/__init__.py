"""Where models come from (sources), how they are built (adapters), and what calibrates them (text)."""
