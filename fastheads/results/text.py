"""Text from files, made safe to show."""


def clean(text: object) -> str:
    """Replace control characters, marks of direction and lone surrogates in `text`, so that it cannot steer what shows it."""
    return "".join(c if c.isprintable() else "?" for c in str(text))
