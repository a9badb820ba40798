"""What people read of an evaluation: results.json, a Markdown table, a page."""
