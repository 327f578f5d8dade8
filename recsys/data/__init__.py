"""From files to cleaned, encoded interactions and honest splits."""
