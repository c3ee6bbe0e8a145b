"""Text about profiles, made safe to show."""

from fastheads.results.protocol import Profile


def clean(text: object) -> str:
    """Replace control characters, marks of direction and lone surrogates in `text`, so that it cannot steer what shows it."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def samples_of(profile: Profile, metric: str) -> str:
    """Return how many samples the heads have, as in "16 sequences a head"; "12 to 16 ..." if their numbers differ."""
    count = profile.arrays[metric].count
    measured = count[count > 0]
    low, high = (int(measured.min()), int(measured.max())) if measured.size else (0, 0)
    number = f"{high:,}" if low == high else f"{low:,} to {high:,}"
    return f"{number} {'tokens' if profile.metadata.get('token_agg') == 'token' else 'sequences'} a head"


def about_samples(profile: Profile, metric: str) -> str:
    """Return what was measured in one line: samples, aggregation, tokens."""
    metadata = profile.metadata
    data = metadata.get("data", {})
    parts = [samples_of(profile, metric), f"token_agg {clean(metadata.get('token_agg', '?'))}"]
    if metadata.get("skip_first"):
        parts.append(f"skip_first {metadata['skip_first']}")
    if "tokens" in data:
        parts.append(f"{data['tokens']:,} tokens" + ("" if data.get("complete", True) else ", incomplete"))
    return ", ".join(parts)
