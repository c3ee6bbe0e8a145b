"""Small forwards that ended wait until several can be measured together."""
