"""What the pages are made of: values glued by name, figures, tables, the numbers the papers report, and sentences about both."""
