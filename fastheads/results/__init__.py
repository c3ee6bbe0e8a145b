"""HeadProfile: what was measured, as a file, tables, pictures; merging."""
