"""Defer the measurement of small forwards that have ended, until several can be measured together."""
