"""Find raw inputs and stream their records, whatever the file format."""
