"""The report: one HTML file that shows profiles in a browser, offline."""
