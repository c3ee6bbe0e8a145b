"""The fused kernel: one read of x leaves updated moments. kernels/README.md derives what is done here and why.

Shapes: x `[batch, seq, heads * head_dim]` per layer of the group; L_h lower triangular with |W_h z| = |z L_h|.
Prefixes: `i_` index of a program or loop, `o_` offsets, `m_` masks, `p_` pointers, `b_` loaded blocks.
"""

# mypy: ignore-errors
# The bodies below are Triton's language in Python's syntax: tuples grow, integers become tensors.

import triton
import triton.language as tl

# Byte layout of a factor's buffer; KernelFactor writes it and the kernel reads it.
TICKET_BYTES = tl.constexpr(128)
# Rows travel as multiples of 16, as addresses are: one compilation, whatever their values.
SLOT = tl.constexpr(16)

# A function of its own: inlined, its registers make the loop over tokens spill.
NOINLINE = True

ALL = tl.constexpr(0)
LAST = tl.constexpr(1)
TOKEN = tl.constexpr(2)

# Metrics of the state: |z|, |W z|, and each over its mean over the layer's heads; with ratios |W z| * ratio and its square too.
METRICS = tl.constexpr(4)
RATIO_METRICS = tl.constexpr(2)
# Of the moments: count, nonfinite, mean, m2, min, max.
PLANES = tl.constexpr(6)
# Of the partial sums: |z|, |W z|, valid tokens; with ratios |W z| * ratio and its square behind them.
SUMS = tl.constexpr(3)

# Of a head's mean vectors, before the mean of z: finite tokens, other tokens, mean of |W z|^2, mean of |z|^2.
VECTOR_HEADER = tl.constexpr(4)
# Elements in a block of the merge of mean vectors.
VECTOR_BLOCK = tl.constexpr(1024)
# Rows of the smallest product; one is needed to add up tokens.
SUM_ROWS = tl.constexpr(16)


@triton.jit
def entry(table, i, SIZE: tl.constexpr):
    """table[i] for an index known only at run time; kernel arguments have no addresses, hence selects."""
    value = table[0]
    for k in tl.static_range(1, SIZE):
        value = tl.where(i == k, table[k], value)
    return value


@triton.jit
def triangle(p_blocks, PIECES: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr,
             UPCAST: tl.constexpr):  # fmt: skip
    """The blocks L[I, J], I >= J, column by column, each [PIECES[I], WIDE * PIECES[J]]: WIDE parts of L from PART on.

    In memory a block is [PIECES[I], PARTS, PIECES[J]]: a row of the high part, then the same row of the next.
    """
    blocks = ()
    for j in tl.static_range(COUNT):
        for i in tl.static_range(j, COUNT):
            o_i = tl.arange(0, PIECES[i])[:, None]
            o_j = PART * PIECES[j] + tl.arange(0, WIDE * PIECES[j])[None, :]
            block = tl.load(p_blocks + o_i * (PARTS * PIECES[j]) + o_j)
            if UPCAST:
                block = block.to(tl.float32)
            blocks = blocks + (block,)
            p_blocks += PARTS * PIECES[i] * PIECES[j]
    return blocks


@triton.jit
def widened(b_z, UPCAST: tl.constexpr):
    """b_z in float32. bfloat16 is its upper half: two values a register, one instruction each."""
    if b_z.dtype == tl.bfloat16 and not UPCAST:
        # The compiler takes two for the odd ones, and these instructions bind the loop.
        z = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [b_z],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        z = b_z.to(tl.float32)
    return z


@triton.jit
def no_sums(BT: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([BT, WIDTH], dtype=tl.float32)


@triton.jit
def column_dot(parts, blocks, acc, J: tl.constexpr, COUNT: tl.constexpr):
    """Acc += sum over I >= J of z_I L[I, J]; the zero blocks above the diagonal are not there."""
    # Blocks of the columns before J: COUNT + (COUNT - 1) + ... , J terms.
    for i in tl.static_range(J, COUNT):
        acc = tl.dot(parts[i], blocks[J * COUNT - J * (J - 1) // 2 + i - J], acc, input_precision="ieee")
    return acc


@triton.jit
def high_plus_low(acc, BT: tl.constexpr, WIDTH: tl.constexpr):
    """[BT, 2 * WIDTH] as the sum of its halves; both lie in the registers of one thread."""
    high, low = acc.reshape(BT, 2, WIDTH).permute(0, 2, 1).split()
    return high + low


@triton.jit
def both_sums(z, c, more_z, more_c):
    return z + more_z, c + more_c


@triton.jit
def bfloat16_parts(z, UPCAST: tl.constexpr):
    """float32 z as a sum of three bfloat16 parts, each what the ones before left over."""
    one = z.to(tl.bfloat16)
    rest = z - one.to(tl.float32)
    two = rest.to(tl.bfloat16)
    three = (rest - two.to(tl.float32)).to(tl.bfloat16)
    if UPCAST:
        one, two, three = one.to(tl.float32), two.to(tl.float32), three.to(tl.float32)
    return one, two, three


@triton.jit
def add_tokens(acc, b_z, BT: tl.constexpr):
    """Acc [SUM_ROWS, width] plus the sum over the tokens of b_z [BT, width], the same in every row. The matrix unit adds up what
    lies in shared memory already; in registers it would be a reduction across all threads.
    """
    return tl.dot(tl.full([SUM_ROWS, BT], 1.0, dtype=b_z.dtype), b_z, acc, input_precision="ieee")


@triton.jit
def no_vector_sums(PIECES: tl.constexpr, COUNT: tl.constexpr):
    """The sums of z before the first tile, a piece each."""
    sums = ()
    for i in tl.static_range(COUNT):
        sums = sums + (no_sums(SUM_ROWS, PIECES[i]),)
    return sums


@triton.jit
def add_kept_tokens(
    sums,
    p_rows,  # [BT] pointers to the head in each token's row
    keep,  # [BT]
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    COUNT: tl.constexpr,
    BT: tl.constexpr,
    Z_PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`sums` plus those of z of the tokens to keep, which are read (again): of the others nothing is, 0 * NaN would be NaN."""
    more = ()
    for i in tl.static_range(COUNT):
        o_i = i * PIECES[0] + tl.arange(0, PIECES[i])[None, :]
        m = keep[:, None] & (o_i < HEAD_DIM)
        b_z = tl.load(p_rows[:, None] + o_i, mask=m, other=0.0)
        acc = no_sums(SUM_ROWS, PIECES[i])
        if Z_PARTS == 1:
            if UPCAST:
                b_z = b_z.to(tl.float32)
            acc = add_tokens(acc, b_z, BT)
        else:
            one, two, three = bfloat16_parts(b_z.to(tl.float32), UPCAST)
            acc = add_tokens(add_tokens(add_tokens(acc, three, BT), two, BT), one, BT)
        more = more + (sums[i] + acc,)
    return more


@triton.jit
def tile_squares(
    source,  # where the tile lies: ([BT] pointers to the head in each token's row,), or descriptors and a place
    present,  # [BT], which tokens to read (the others are 0); None: all
    vector_sums,  # of z, a piece each, or ()
    blocks,
    lows,
    lowest,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    COUNT: tl.constexpr,
    BT: tl.constexpr,
    PASSES: tl.constexpr,
    PARTS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    TOGETHER: tl.constexpr,
    TMA: tl.constexpr,
    Z_PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """|z|^2 and |z L|^2 of a tile of tokens, float32 [BT] each, the latter less the head's scale; and `vector_sums` plus those of
    the tile, where there are any.
    """
    first = ()
    second = ()
    third = ()
    raw = ()
    square_z = tl.zeros([BT], dtype=tl.float32)
    squares = ()  # of the pieces as wide as the first, added up: one reduction
    for i in tl.static_range(COUNT):
        # Only the last piece may be narrower than the first.
        if TMA:
            if PIECES[i] == PIECES[0]:
                b_z = source[0].load([source[2], source[3] + i * PIECES[0]])
            else:
                b_z = source[1].load([source[2], source[3] + i * PIECES[0]])
        else:
            o_i = i * PIECES[0] + tl.arange(0, PIECES[i])[None, :]
            if present is not None:
                m = present[:, None] & (o_i < HEAD_DIM)
                b_z = tl.load(source[0][:, None] + o_i, mask=m, other=0.0)
            elif i * PIECES[0] + PIECES[i] > HEAD_DIM:
                # Beyond head_dim lies the next head, or nothing: select it away, it may hold NaN.
                b_z = tl.load(source[0][:, None] + o_i, mask=o_i < HEAD_DIM, other=0.0)
            else:
                b_z = tl.load(source[0][:, None] + o_i)
        raw = raw + (b_z,)
        z = widened(b_z, UPCAST)
        if not TOGETHER:
            if PIECES[i] != PIECES[0]:
                square_z += tl.sum(z * z, axis=1)
            elif i == 0:
                squares = (z * z,)
            else:
                squares = (squares[0] + z * z,)
        if Z_PARTS == 1:
            if UPCAST:
                b_z = z
            first = first + (b_z,)
        else:
            one, two, three = bfloat16_parts(z, UPCAST)
            first = first + (one,)
            second = second + (two,)
            third = third + (three,)
    if not TOGETHER:
        square_z += tl.sum(squares[0], axis=1)
    more_sums = ()
    if VECTORS:
        for i in tl.static_range(COUNT):
            # Of the tile alone, then added: the matrix unit cuts off what it adds.
            acc = no_sums(SUM_ROWS, PIECES[i])
            if Z_PARTS == 3:
                acc = add_tokens(add_tokens(acc, third[i], BT), second[i], BT)
            acc = add_tokens(acc, first[i], BT)
            more_sums = more_sums + (vector_sums[i] + acc,)
    square_c = tl.zeros([BT], dtype=tl.float32)
    for j in tl.static_range(COUNT):
        # Small products first: what they add is not lost under the large ones.
        if SIDE_BY_SIDE:
            acc = no_sums(BT, 2 * PIECES[j])
        else:
            acc = no_sums(BT, PIECES[j])
        if PASSES == 2 and not SIDE_BY_SIDE:
            if PARTS == 3:
                acc = column_dot(first, lowest, acc, j, COUNT)
            acc = column_dot(first, lows, acc, j, COUNT)
            if Z_PARTS == 3:
                acc = column_dot(second, lows, acc, j, COUNT)
        if Z_PARTS == 3:
            acc = column_dot(third, blocks, acc, j, COUNT)
            acc = column_dot(second, blocks, acc, j, COUNT)
        acc = column_dot(first, blocks, acc, j, COUNT)
        if SIDE_BY_SIDE:
            acc = high_plus_low(acc, BT, PIECES[j])
        if TOGETHER:
            # One reduction has one layout, the product's: four threads share a row, not eight, and the loads follow it.
            z = (raw[j].to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
            more_z, more_c = tl.reduce((z * z, acc * acc), 1, both_sums)
            square_z += more_z
            square_c += more_c
        else:
            square_c += tl.sum(acc * acc, axis=1)
    return square_z, square_c, more_sums


@triton.jit
def no_moments(COUNT: tl.constexpr, HP: tl.constexpr):
    """The moments of no samples of COUNT metrics, PLANES float64 [COUNT, HP]: count, nonfinite, mean, m2, min, max."""
    zero = tl.zeros([COUNT, HP], dtype=tl.float64)
    return zero, zero, zero, zero, zero + float("inf"), zero - float("inf")


@triton.jit
def combine(n, bad, mean, m2, low, high):
    """The moments of several parts of a stream, [metrics, parts, HP] each, as one: [metrics, HP] each.

    n = sum n_i, mean = sum n_i mean_i / n, m2 = sum m2_i + n_i (mean_i - mean)^2, with the rounding error of the
    mean fed back (Chan, Golub & LeVeque 1983). An empty part has n = 0 and mean 0.
    """
    count = tl.sum(n, axis=1)
    divisor = tl.maximum(count, 1.0)
    centre = tl.sum(n * mean, axis=1) / divisor
    # Absent parts have mean 0: their deviation is finite, and n = 0 takes it out.
    deviation = mean - centre[:, None, :]
    residue = tl.sum(n * deviation, axis=1) / divisor
    squares = tl.sum(m2 + n * deviation * deviation, axis=1) - count * residue * residue
    return (
        count,
        tl.sum(bad, axis=1),
        centre + residue,
        tl.maximum(squares, 0.0),
        tl.min(low, axis=1),
        tl.max(high, axis=1),
    )


@triton.jit
def merged(a, b):
    """Chan's formula for two streams; either may be empty."""
    n = tl.maximum(a[0] + b[0], 1.0)
    delta = b[2] - a[2]
    share = b[0] / n
    return (
        a[0] + b[0],
        a[1] + b[1],
        a[2] + delta * share,
        a[3] + b[3] + delta * delta * (a[0] * share),
        tl.minimum(a[4], b[4]),
        tl.maximum(a[5], b[5]),
    )


@triton.jit
def no_samples(COUNT: tl.constexpr, SLOTS: tl.constexpr, HP: tl.constexpr):
    """The counts and sums of `add_samples` before the first sample, [COUNT, SLOTS, HP] each."""
    none = tl.zeros([COUNT, SLOTS, HP], dtype=tl.int32)
    zero = tl.zeros([COUNT, SLOTS, HP], dtype=tl.float64)
    return none, none, zero, zero, zero, zero + float("inf"), zero - float("inf")


@triton.jit
def with_relatives(values, m_heads, per_head):
    """|z|, |W z|, and each over its mean over the layer's heads, from float64 values [METRICS, SLOTS, HP] that hold the first
    two twice; per_head is 1 / heads.
    """
    mean = (tl.sum(tl.where(m_heads, values, 0.0), axis=2) * per_head)[:, :, None]
    # A mean of norms is 0 where all are, and 0/0 is NaN; one NaN or infinite head leaves the layer without a mean.
    no_mean = (mean == 0) | (mean == float("inf"))
    relative = tl.arange(0, METRICS)[:, None, None] >= METRICS // 2
    return values / tl.where(relative, tl.where(no_mean, float("nan"), mean), 1.0)


@triton.jit
def add_samples(kept, values, present, m_heads):
    """`kept` with one sample more in each slot, from float64 values [metrics, SLOTS, HP].

    Sums are of deviations d from the slot's first sample, which is itself one of the n: of m2 = sum d^2 - (sum d)^2 / n
    the second term is at most n m2, so that no more than n roundings of m2 are lost.
    """
    seen, n, first, sum_d, sum_d2, low, high = kept
    present = present & m_heads
    finite = present & (tl.abs(values) < float("inf"))  # false for NaN
    first = tl.where(finite & (n == 0), values, first)
    d = tl.where(finite, values - first, 0.0)  # selected, never multiplied by zero
    return (
        seen + present.to(tl.int32),
        n + finite.to(tl.int32),
        first,
        sum_d + d,
        sum_d2 + d * d,
        tl.where(finite & (values < low), values, low),
        tl.where(finite & (values > high), values, high),
    )


@triton.jit
def sample_moments(kept):
    """The moments of all slots together."""
    seen, n, first, sum_d, sum_d2, low, high = kept
    count = n.to(tl.float64)
    mean_d = sum_d / tl.maximum(count, 1.0)
    m2 = tl.maximum(sum_d2 - sum_d * mean_d, 0.0)
    return combine(count, (seen - n).to(tl.float64), first + mean_d, m2, low, high)


@triton.jit
def state_pointers(state, row, heads, state_rows, state_heads, FIRST: tl.constexpr, COUNT: tl.constexpr,
                   WIDE: tl.constexpr, HP: tl.constexpr):  # fmt: skip
    """Pointers [COUNT, HP] to the counts of one row of the state, of the metrics from FIRST on; which of them are there; and
    the stride between the state's planes. WIDE: the state has the ratio's metrics.
    """
    stride_metric = state_rows.to(tl.int64) * state_heads
    o_metric = tl.arange(0, COUNT)[:, None] * stride_metric
    p = state + row.to(tl.int64) * state_heads + o_metric + tl.arange(0, HP)[None, :]
    if FIRST > 0:
        p += FIRST * stride_metric
    m = (tl.arange(0, COUNT)[:, None] >= 0) & (tl.arange(0, HP)[None, :] < heads)
    return p, m, (METRICS + RATIO_METRICS if WIDE else METRICS) * stride_metric


@triton.jit
def read_state(p, stride_plane, m):
    """The moments in the state, with the counts as float64; and the counts. Those are int64 bits in float64 storage."""
    p_counts = p.to(tl.pointer_type(tl.int64))
    count = tl.load(p_counts, mask=m, other=0)
    bad = tl.load(p_counts + stride_plane, mask=m, other=0)
    moments = (
        count.to(tl.float64),
        tl.zeros(count.shape, dtype=tl.float64),  # added as integers by write_state
        tl.load(p + 2 * stride_plane, mask=m, other=0.0),
        tl.load(p + 3 * stride_plane, mask=m, other=0.0),
        tl.load(p + 4 * stride_plane, mask=m, other=float("inf")),
        tl.load(p + 5 * stride_plane, mask=m, other=-float("inf")),
    )
    return moments, count, bad


@triton.jit
def write_state(p, stride_plane, m, old, new, count, bad):
    """Merge the moments `new` [metrics, HP] into what `read_state` returned, and store them."""
    both = merged(old, new)
    p_counts = p.to(tl.pointer_type(tl.int64))
    tl.store(p_counts, count + new[0].to(tl.int64), mask=m)
    tl.store(p_counts + stride_plane, bad + new[1].to(tl.int64), mask=m)
    for plane in tl.static_range(2, PLANES):
        tl.store(p + plane * stride_plane, both[plane], mask=m)


@triton.jit
def arrived_last(p_ticket, programs):
    """True in the program of the layer that comes last; it then reads (with .cg) what the others stored."""
    # The ticket is taken by one thread: without the barrier it may overtake the stores of the others.
    tl.debug_barrier()
    before = tl.atomic_add(p_ticket, 1, sem="acq_rel")
    tl.debug_barrier()
    last = before == programs - 1
    if last:
        tl.store(p_ticket, 0)  # for the next launch
    return last


@triton.jit(noinline=NOINLINE)
def merge_samples(
    partial,
    state,
    row,
    batch,
    heads,
    chunks,
    tiles,
    tiles_per_program,
    tokens,
    state_rows,
    state_heads,
    COUNTED: tl.constexpr,  # valid tokens were counted; else they are `tokens` in each row
    RATIO: tl.constexpr,
    WIDE: tl.constexpr,  # the state has the ratio's metrics, whether they are measured or not
    HP: tl.constexpr,
    BB: tl.constexpr,
):
    """Samples of a layer from its partial sums, and their moments into the state."""
    p_state, m_state, stride_plane = state_pointers(
        state, row, heads, state_rows, state_heads, 0, METRICS, WIDE, HP
    )
    old, old_count, old_bad = read_state(
        p_state, stride_plane, m_state
    )  # first: its wait is that of the sums
    if RATIO:
        # Beside the others, not among them: what those are does not change, and no lane is empty.
        p_ratio, m_ratio, _ = state_pointers(
            state, row, heads, state_rows, state_heads, METRICS, RATIO_METRICS, WIDE, HP
        )
        ratio_old, ratio_old_count, ratio_old_bad = read_state(p_ratio, stride_plane, m_ratio)
        ratio_kept = no_samples(RATIO_METRICS, BB, HP)
    o_h = tl.arange(0, HP)[None, None, :]
    m_h = o_h < heads
    plane = chunks * batch * heads
    o_value = (tl.arange(0, METRICS)[:, None, None] % 2) * plane
    o_ratio = (tl.arange(0, RATIO_METRICS)[:, None, None] + SUMS) * plane
    # Divisions in float64 are long: those by one number are done once.
    per_head = 1.0 / heads.to(tl.float64)
    per_token = 1.0 / tl.maximum(tokens, 1).to(tl.float64)
    kept = no_samples(METRICS, BB, HP)
    for i_b in range(0, batch, BB):
        o_b = i_b + tl.arange(0, BB)[None, :, None]
        m = (o_b < batch) & m_h
        values = tl.zeros([METRICS, BB, HP], dtype=tl.float64)
        if RATIO:
            ratios = tl.zeros([RATIO_METRICS, BB, HP], dtype=tl.float64)
        count = tl.zeros([1, BB, HP], dtype=tl.float64)
        first = o_b * tiles // tiles_per_program
        spans = (
            o_b * tiles + tiles - 1
        ) // tiles_per_program - first  # programs beyond the first, of each row
        for c in range(chunks):
            p_in = partial + (c * batch + o_b) * heads + o_h
            there = m & (c <= spans)
            values += tl.load(p_in + o_value, mask=there & (o_value >= 0), other=0.0, cache_modifier=".cg")
            if RATIO:
                ratios += tl.load(
                    p_in + o_ratio, mask=there & (o_ratio >= 0), other=0.0, cache_modifier=".cg"
                )
            if COUNTED:
                count += tl.load(p_in + (SUMS - 1) * plane, mask=there, other=0.0, cache_modifier=".cg")
        if COUNTED:
            values /= tl.maximum(count, 1.0)
            if RATIO:
                ratios /= tl.maximum(count, 1.0)
        else:
            count += tl.where(m, tokens.to(tl.float64), 0.0)
            values *= per_token
            if RATIO:
                ratios *= per_token
        kept = add_samples(kept, with_relatives(values, m_h, per_head), count > 0, m_h)
        if RATIO:
            ratio_kept = add_samples(ratio_kept, ratios, count > 0, m_h)
    write_state(p_state, stride_plane, m_state, old, sample_moments(kept), old_count, old_bad)
    if RATIO:
        ratio_moments = sample_moments(ratio_kept)
        write_state(p_ratio, stride_plane, m_ratio, ratio_old, ratio_moments, ratio_old_count, ratio_old_bad)


@triton.jit
def merge_vectors(
    p_parts,  # the sums of the head's first program
    stride_part,  # to those of the next
    programs,
    p_vectors,  # the head's place in the state of the mean vectors
    HEAD_DIM: tl.constexpr,
    VP: tl.constexpr,  # HEAD_DIM, padded to a power of two
):
    """Merge the sums of all programs of one head into its mean vectors."""
    BP: tl.constexpr = VECTOR_BLOCK // VP
    o_d = tl.arange(0, VP)[None, :]
    o_n = tl.arange(0, VECTOR_HEADER)[None, :]
    header = tl.zeros([VECTOR_HEADER], dtype=tl.float64)
    total = tl.zeros([VP], dtype=tl.float64)
    for i in range(0, programs, BP):
        o_p = i + tl.arange(0, BP)[:, None]
        p = p_parts + o_p * stride_part
        there = o_p < programs
        header += tl.sum(tl.load(p + o_n, mask=there & (o_n >= 0), other=0.0, cache_modifier=".cg"), axis=0)
        m = there & (o_d < HEAD_DIM)
        total += tl.sum(tl.load(p + VECTOR_HEADER + o_d, mask=m, other=0.0, cache_modifier=".cg"), axis=0)
    place = tl.arange(0, VECTOR_HEADER)
    new = tl.sum(tl.where(place == 0, header, 0.0), axis=0)
    bad = tl.sum(tl.where(place == 1, header, 0.0), axis=0)
    p_counts = p_vectors.to(tl.pointer_type(tl.int64))
    old = tl.load(p_counts)
    tl.store(p_counts + 1, tl.load(p_counts + 1) + bad.to(tl.int64))
    tl.store(p_counts, old + new.to(tl.int64))
    per_token = 1.0 / tl.maximum(new, 1.0)
    share = new / tl.maximum(old.to(tl.float64) + new, 1.0)
    merge_means(p_vectors + place, header * per_token, place >= 2, share)
    o_d = tl.arange(0, VP)
    merge_means(p_vectors + VECTOR_HEADER + o_d, total * per_token, o_d < HEAD_DIM, share)


@triton.jit
def merge_means(p, new, m, share):
    """Merge means with those in memory; `share` is the part of all tokens that the new ones are of (0: nothing changes)."""
    old = tl.load(p, mask=m, other=0.0)
    tl.store(p, tl.where(share == 1.0, new, old + (new - old) * share), mask=m)


@triton.jit
def factor_blocks(
    p_blocks,
    PIECES: tl.constexpr,
    COUNT: tl.constexpr,
    PASSES: tl.constexpr,
    PARTS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The blocks of the high part of L (with the low one beside it: SIDE_BY_SIDE), those of the next and of the third, where
    the passes take them.
    """
    blocks = triangle(p_blocks, PIECES, COUNT, PARTS, 0, 2 if SIDE_BY_SIDE else 1, UPCAST)
    lows = ()
    lowest = ()
    if PASSES == 2 and not SIDE_BY_SIDE:
        lows = triangle(p_blocks, PIECES, COUNT, PARTS, 1, 1, UPCAST)
        if PARTS == 3:
            lowest = triangle(p_blocks, PIECES, COUNT, PARTS, 2, 1, UPCAST)
    return blocks, lows, lowest


@triton.jit
def store_vector_sums(
    p_out, count, bad, power, output_power, sums, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Store a program's sums for the mean vectors, float64 [VECTOR_HEADER + HEAD_DIM]."""
    tl.store(p_out, count.to(tl.float64))
    tl.store(p_out + 1, bad.to(tl.float64))
    tl.store(p_out + 2, power)
    tl.store(p_out + 3, output_power)
    one_row = tl.arange(0, SUM_ROWS)[:, None] == 0
    for i in tl.static_range(COUNT):
        o_i = i * PIECES[0] + tl.arange(0, PIECES[i])[None, :]
        p = p_out + VECTOR_HEADER + o_i + tl.arange(0, SUM_ROWS)[:, None] * 0
        tl.store(p, sums[i].to(tl.float64), mask=one_row & (o_i < HEAD_DIM))


@triton.jit
def sum_finite_tokens(
    p_x,
    p_blocks,
    p_scale,
    vector_partial,
    valid,
    stride_xb16,
    stride_xs16,
    batch,
    seq,
    heads,
    skip_first,
    tiles_per_program,
    i_h,
    i_p,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    COUNT: tl.constexpr,
    BT: tl.constexpr,
    PARTS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    TOGETHER: tl.constexpr,
    Z_PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The sums for the mean vectors of a stretch in which `stream_tokens` met a token that is not finite, once more and without
    such tokens: each tile is read for its norms, and again for its sum.
    """
    blocks, lows, lowest = factor_blocks(p_blocks, PIECES, COUNT, 2, PARTS, SIDE_BY_SIDE, UPCAST)
    PER16: tl.constexpr = 128 // p_x.dtype.element_ty.primitive_bitwidth
    o_t = tl.arange(0, BT)
    tiles = tl.cdiv(seq, BT)
    first = i_p * tiles_per_program
    count = tl.zeros([BT], dtype=tl.int32)
    seen = tl.zeros([BT], dtype=tl.int32)
    power = tl.zeros([BT], dtype=tl.float64)
    output_power = tl.zeros([BT], dtype=tl.float64)
    sums = no_vector_sums(PIECES, COUNT)
    for tile in tl.range(first, tl.minimum(first + tiles_per_program, batch * tiles), num_stages=1):
        i_b = tile // tiles
        t_first = (tile - i_b * tiles) * BT
        t_start = tl.maximum(tl.minimum(t_first, seq - BT), 0)
        t = t_start + o_t
        real = (t >= tl.maximum(t_first, skip_first)) & (t < seq)
        if valid is not None:
            real = real & (tl.load(valid + i_b.to(tl.int64) * seq + t, mask=real, other=0) != 0)
        o_row = i_b.to(tl.int64) * stride_xb16 + tl.minimum(t, seq - 1).to(tl.int64) * stride_xs16
        p_rows = p_x + o_row * PER16 + i_h * HEAD_DIM
        square_z, square_c, _ = tile_squares(
            (p_rows,), real, (), blocks, lows, lowest,
            HEAD_DIM, PIECES, COUNT, BT, 2, PARTS, SIDE_BY_SIDE, TOGETHER, False, Z_PARTS, UPCAST, False,
        )  # fmt: skip
        keep = real & (square_z < float("inf")) & (square_c < float("inf"))  # false for NaN
        count += keep.to(tl.int32)
        seen += real.to(tl.int32)
        power += tl.where(keep, square_c, 0.0).to(tl.float64)
        output_power += tl.where(keep, square_z, 0.0).to(tl.float64)
        sums = add_kept_tokens(sums, p_rows, keep, HEAD_DIM, PIECES, COUNT, BT, Z_PARTS, UPCAST)
    scale = tl.load(p_scale).to(tl.float64)
    total = tl.sum(count, axis=0)
    store_vector_sums(
        vector_partial + (i_p * heads + i_h) * (VECTOR_HEADER + HEAD_DIM), total, tl.sum(seen, axis=0) - total,
        tl.sum(power, axis=0) * (scale * scale), tl.sum(output_power, axis=0), sums, HEAD_DIM, PIECES, COUNT,
    )  # fmt: skip


@triton.jit
def stream_tokens(
    p_x,
    p_blocks,
    p_scale,
    partial,
    vector_partial,
    norms,
    valid,
    last_index,
    token_scale,
    token_ratio,
    stride_xb16,
    stride_xs16,
    batch,
    seq,
    heads,
    skip_first,
    tiles_per_program,
    chunks,
    i_h,
    i_p,
    MODE: tl.constexpr,
    MASKED: tl.constexpr,  # some token of a tile may not be real
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    COUNT: tl.constexpr,
    BT: tl.constexpr,
    PASSES: tl.constexpr,
    PARTS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    TOGETHER: tl.constexpr,
    TMA: tl.constexpr,
    Z_PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One head, a stretch of its tokens: sums (ALL), samples (LAST) or norms of each token (TOKEN); and with `vector_partial` the
    sums for the mean vectors. False where those hold what is not finite (ALL and TOKEN).
    """
    VECTORS: tl.constexpr = vector_partial is not None
    are_finite = True
    blocks, lows, lowest = factor_blocks(p_blocks, PIECES, COUNT, PASSES, PARTS, SIDE_BY_SIDE, UPCAST)
    head_scale = tl.load(p_scale)
    PER16: tl.constexpr = 128 // p_x.dtype.element_ty.primitive_bitwidth
    stride_xs = stride_xs16.to(tl.int64) * PER16
    plane = chunks * batch * heads  # of this layer's partial sums: planes [chunks, batch, heads]
    o_t = tl.arange(0, BT)
    if MODE == LAST:
        # A tile is BT rows of the batch at their last valid tokens.
        o_b = i_p * BT + o_t
        m_b = o_b < batch
        row = tl.minimum(o_b, batch - 1).to(tl.int64)
        if last_index is not None:
            token = tl.load(last_index + row)
            m_b = m_b & (token >= 0)
            token = tl.maximum(token, 0)
        else:
            token = tl.zeros_like(row) + (seq - 1)
            m_b = m_b & (token >= skip_first)
        p_rows = p_x + i_h * HEAD_DIM + (row * stride_xb16 + token * stride_xs16) * PER16
        square_z, square_c, _ = tile_squares(
            (p_rows,), None, (), blocks, lows, lowest,
            HEAD_DIM, PIECES, COUNT, BT, PASSES, PARTS, SIDE_BY_SIDE, TOGETHER, False, Z_PARTS, UPCAST, False,
        )  # fmt: skip
        n_z, n_c = tl.sqrt(square_z), tl.sqrt(square_c) * head_scale
        if VECTORS:
            keep = m_b & (square_z < float("inf")) & (square_c < float("inf"))  # false for NaN
            count = tl.sum(keep.to(tl.int32), axis=0)
            scale = head_scale.to(tl.float64)
            store_vector_sums(
                vector_partial + (i_p * heads + i_h) * (VECTOR_HEADER + HEAD_DIM),
                count, tl.sum(m_b.to(tl.int32), axis=0) - count,
                tl.sum(tl.where(keep, square_c, 0.0).to(tl.float64), axis=0) * (scale * scale),
                tl.sum(tl.where(keep, square_z, 0.0).to(tl.float64), axis=0),
                add_kept_tokens(
                    no_vector_sums(PIECES, COUNT), p_rows, keep, HEAD_DIM, PIECES, COUNT, BT, Z_PARTS, UPCAST
                ),
                HEAD_DIM, PIECES, COUNT,
            )  # fmt: skip
        if token_scale is not None:
            n_c *= tl.load(token_scale + row * seq + token)
        p_out = partial + row * heads + i_h
        tl.store(p_out, n_z.to(tl.float64), mask=o_b < batch)
        tl.store(p_out + plane, n_c.to(tl.float64), mask=o_b < batch)
        tl.store(p_out + (SUMS - 1) * plane, m_b.to(tl.float64), mask=o_b < batch)
        if token_ratio is not None:
            ratio = n_c.to(tl.float64) * tl.load(token_ratio + row * seq + token).to(tl.float64)
            tl.store(p_out + SUMS * plane, ratio, mask=o_b < batch)
            tl.store(p_out + (SUMS + 1) * plane, ratio * ratio, mask=o_b < batch)
    else:
        # The tiles of all rows of the batch in one line: this program takes a stretch of it.
        tiles = tl.cdiv(seq, BT)
        first = i_p * tiles_per_program
        steps = tl.minimum(tiles_per_program, batch * tiles - first)
        sum_z = tl.zeros([BT], dtype=tl.float32)
        sum_c = tl.zeros([BT], dtype=tl.float32)
        count = tl.zeros([BT], dtype=tl.int32)
        if token_ratio is not None:
            sum_r = tl.zeros([BT], dtype=tl.float32)
            sum_r2 = tl.zeros([BT], dtype=tl.float32)
        vector_sums = ()
        if VECTORS:
            vector_sums = no_vector_sums(PIECES, COUNT)
            power = tl.zeros([BT], dtype=tl.float32)
            output_power = tl.zeros([BT], dtype=tl.float32)
            tokens = tl.zeros([BT], dtype=tl.int32)
        if TMA:
            rows_of_x = tl.make_tensor_descriptor(
                p_x,
                shape=[batch * seq, heads * HEAD_DIM],
                strides=[stride_xs, 1],
                block_shape=[BT, PIECES[0]],
            )
            rows_of_x_last = rows_of_x
            if PIECES[COUNT - 1] != PIECES[0]:
                rows_of_x_last = tl.make_tensor_descriptor(
                    p_x,
                    shape=[batch * seq, heads * HEAD_DIM],
                    strides=[stride_xs, 1],
                    block_shape=[BT, PIECES[COUNT - 1]],
                )
        # Beyond a short sequence the tile repeats its last token: no mask on the loads, and selected away below.
        o_rows = tl.minimum(o_t, seq - 1).to(tl.int64) * stride_xs + i_h * HEAD_DIM
        i_b = first // tiles
        i_t = first - i_b * tiles
        # Instructions bind this loop as much as memory does: what is one number for the tile stays one number.
        for step in tl.range(0, steps, num_stages=STAGES):
            t_first = i_t * BT
            # The last tile of a row starts early, to end with it; tokens of the tile before are selected away.
            t_start = tl.maximum(tl.minimum(t_first, seq - BT), 0)
            t_real = tl.maximum(t_first, skip_first)
            # t_real <= t_start + o_t < seq, in one comparison
            real = (o_t + (t_start - t_real)).to(tl.uint32) < tl.maximum(seq - t_real, 0).to(tl.uint32)
            place = i_b.to(tl.int64) * seq + t_start  # of the tile in [batch, seq]
            if token_ratio is not None:
                # Before the products, behind which it arrives.
                per_norm = tl.load(token_ratio + place + o_t, mask=real, other=0.0)
            present = None
            if VECTORS and MASKED:
                if valid is not None:
                    real = real & (tl.load(valid + place + o_t, mask=real, other=0) != 0)
                present = real
            if TMA:
                source = (rows_of_x, rows_of_x_last, place.to(tl.int32), i_h * HEAD_DIM)
            else:
                o_b = i_b.to(tl.int64) * stride_xb16.to(tl.int64)
                o_s = t_start.to(tl.int64) * stride_xs16.to(tl.int64)
                source = (p_x + (o_b + o_s) * PER16 + o_rows,)
            square_z, square_c, vector_sums = tile_squares(
                source, present, vector_sums, blocks, lows, lowest,
                HEAD_DIM, PIECES, COUNT, BT, PASSES, PARTS, SIDE_BY_SIDE, TOGETHER, TMA, Z_PARTS, UPCAST, VECTORS,
            )  # fmt: skip
            n_z, n_c = tl.sqrt(square_z), tl.sqrt(square_c) * head_scale
            if VECTORS:
                # Not of the norms: their squares may leave float32 where these do not.
                if MASKED:
                    square_z = tl.where(real, square_z, 0.0)  # L may hold NaN
                    square_c = tl.where(real, square_c, 0.0)
                    tokens += real.to(tl.int32)
                output_power += square_z
                power += square_c
            if token_scale is not None:
                n_c *= tl.load(token_scale + place + o_t, mask=real, other=0.0)
            last_tile = i_t == tiles - 1
            if MODE == TOKEN:
                # [2, heads, batch * seq]: tokens fastest, so that a tile is one stretch of memory.
                p_out = norms + i_h.to(tl.int64) * batch * seq + place + o_t
                tl.store(p_out, n_z, mask=real)
                tl.store(p_out + heads.to(tl.int64) * batch * seq, n_c, mask=real)
            else:
                if valid is not None:
                    if not VECTORS:
                        real = real & (tl.load(valid + place + o_t, mask=real, other=0) != 0)
                    count += real.to(tl.int32)
                if MASKED:
                    n_z = tl.where(real, n_z, 0.0)
                    n_c = tl.where(real, n_c, 0.0)
                sum_z += n_z
                sum_c += n_c
                if token_ratio is not None:
                    ratio = n_c * per_norm
                    if MASKED:
                        ratio = tl.where(real, ratio, 0.0)  # 0 * inf
                    sum_r += ratio
                    sum_r2 += ratio * ratio
                if last_tile | (step == steps - 1):
                    # A row that spans programs has one chunk of partial sums from each.
                    i_c = i_p - i_b * tiles // tiles_per_program
                    p_out = partial + (i_c * batch + i_b) * heads + i_h
                    tl.store(p_out, tl.sum(sum_z.to(tl.float64), axis=0))
                    tl.store(p_out + plane, tl.sum(sum_c.to(tl.float64), axis=0))
                    sum_z = tl.zeros([BT], dtype=tl.float32)
                    sum_c = tl.zeros([BT], dtype=tl.float32)
                    if token_ratio is not None:
                        tl.store(p_out + SUMS * plane, tl.sum(sum_r.to(tl.float64), axis=0))
                        tl.store(p_out + (SUMS + 1) * plane, tl.sum(sum_r2.to(tl.float64), axis=0))
                        sum_r = tl.zeros([BT], dtype=tl.float32)
                        sum_r2 = tl.zeros([BT], dtype=tl.float32)
                    if valid is not None:
                        tl.store(p_out + (SUMS - 1) * plane, tl.sum(count, axis=0).to(tl.float64))
                        count = tl.zeros([BT], dtype=tl.int32)
            i_b = tl.where(last_tile, i_b + 1, i_b)
            i_t = tl.where(last_tile, 0, i_t + 1)
        if VECTORS:
            total_power = tl.sum(power.to(tl.float64), axis=0)
            total_output_power = tl.sum(output_power.to(tl.float64), axis=0)
            scale = head_scale.to(tl.float64)
            if MASKED:
                total = tl.sum(tokens, axis=0)
            else:
                total = steps * BT
            store_vector_sums(
                vector_partial + (i_p * heads + i_h) * (VECTOR_HEADER + HEAD_DIM), total, total * 0,
                total_power * (scale * scale), total_output_power, vector_sums, HEAD_DIM, PIECES, COUNT,
            )  # fmt: skip
            are_finite = total_power + total_output_power < float("inf")  # False for NaN
    return are_finite


@triton.jit(
    # One compilation serves every shape: what is known of the integers is said in the kernel.
    do_not_specialize=[
        "stride_xb16",
        "stride_xs16",
        "batch",
        "seq",
        "heads",
        "state_rows",
        "state_heads",
        "skip_first",
        "tiles_per_program",
        "chunks",
        "vector_heads",
        "vector_width",
    ],
    # They may lie anywhere in a larger buffer, and are read element by element.
    do_not_specialize_on_alignment=["state", "vectors"],
)
def head_stats_kernel(
    x_table,  # addresses of x, one a layer of the group
    factor_table,  # addresses of the factors' buffers
    row_table,  # rows of the state, times SLOT
    state,  # float64 [PLANES, METRICS, state_rows, state_heads]; if WIDE RATIO_METRICS more
    partial,  # float64, of each layer [SUMS, chunks, batch, heads] (not in TOKEN): sums of |z|, sums of |z L|, valid tokens
    #           (where not all are); with token_ratio RATIO_METRICS more: sums of |z L| * ratio and of its square; behind
    #           them with vectors [programs of a head, heads, VECTOR_HEADER + HEAD_DIM]: tokens whose squares are finite,
    #           other tokens, sums of |z L|^2, of |z|^2 and of z
    norms,  # float32 [layers, 2, heads, batch * seq] (TOKEN)
    valid,  # uint8 [batch, seq]
    last_index,  # int64 [batch]
    token_scale,  # float32 [layers, batch, seq]
    token_ratio,  # likewise; not in TOKEN, whose moments are another kernel's
    vectors,  # float64 [state_rows, vector_heads, vector_width], or None: counts (int64 bits), means of |z L|^2, |z|^2 and z
    stride_xb16,  # strides of x in units of 16 bytes
    stride_xs16,
    batch,
    seq,
    heads,
    state_rows,
    state_heads,
    skip_first,
    tiles_per_program,
    chunks,
    vector_heads,
    vector_width,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,  # entries in the tables
    MODE: tl.constexpr,
    MASKED: tl.constexpr,  # some token of a tile may not be real
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCKS: tl.constexpr,  # elements in the blocks of one pass
    BT: tl.constexpr,
    HP: tl.constexpr,  # heads, padded to a power of two
    BB: tl.constexpr,  # rows of the batch in a block of the merge
    VP: tl.constexpr,  # HEAD_DIM, padded to a power of two
    FAST: tl.constexpr,  # one pass for the heads whose flag is unset
    Z_PARTS: tl.constexpr,
    PARTS: tl.constexpr,  # of L in memory; two passes take all of them
    SIDE_BY_SIDE: tl.constexpr,  # both parts of L in one product
    TOGETHER: tl.constexpr,  # one reduction for the squares of z and of the product
    TMA: tl.constexpr,  # x by bulk copies; its rows lie evenly spaced
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
    EXACT_STAGES: tl.constexpr,
    WIDE: tl.constexpr,  # the state has the ratio's metrics; they are measured with token_ratio
):
    """One launch for a group of layers. Grid: (heads fastest, then stretches of the tokens; layers)."""
    i_l = tl.program_id(1)
    i_h = tl.program_id(0) % heads
    i_p = tl.program_id(0) // heads

    # Every address is a multiple of 16 bytes: the launcher sees to it, and 16-byte loads depend on it.
    p_x = tl.multiple_of(entry(x_table, i_l, SIZE).to(tl.pointer_type(DTYPE)), 16)

    p_factor = tl.multiple_of(entry(factor_table, i_l, SIZE).to(tl.pointer_type(tl.uint8)), 128)
    p_ticket = p_factor.to(tl.pointer_type(tl.int32))
    p_scale = (p_factor + TICKET_BYTES).to(tl.pointer_type(tl.float32))
    p_flag = (p_factor + TICKET_BYTES + heads * 4).to(tl.pointer_type(tl.int32))
    WEIGHT: tl.constexpr = tl.bfloat16 if Z_PARTS == 3 else DTYPE
    p_head_tickets = p_flag + heads
    p_blocks = (p_factor + TICKET_BYTES + tl.cdiv(heads * 12, 128) * 128).to(tl.pointer_type(WEIGHT))
    p_blocks += i_h.to(tl.int64) * (PARTS * BLOCKS)

    if token_scale is not None:
        token_scale += i_l.to(tl.int64) * batch * seq
    RATIO: tl.constexpr = token_ratio is not None
    if RATIO:
        token_ratio += i_l.to(tl.int64) * batch * seq
    VECTORS: tl.constexpr = vectors is not None
    SAMPLE_SUMS: tl.constexpr = 0 if MODE == TOKEN else SUMS + RATIO_METRICS if RATIO else SUMS
    programs = tl.num_programs(0) // heads
    of_layer = SAMPLE_SUMS * chunks * batch * heads
    vector_partial = None
    if VECTORS:
        partial += i_l.to(tl.int64) * (of_layer + programs * heads * (VECTOR_HEADER + HEAD_DIM))
        vector_partial = partial + of_layer
    elif MODE != TOKEN:
        partial += i_l.to(tl.int64) * of_layer
    if MODE == TOKEN:
        norms += i_l.to(tl.int64) * 2 * heads * batch * seq
    one_pass = False
    if FAST:
        one_pass = tl.load(p_flag + i_h) == 0
    if one_pass:
        are_finite = stream_tokens(
            p_x, p_blocks, p_scale + i_h, partial, vector_partial, norms, valid, last_index, token_scale, token_ratio,
            stride_xb16, stride_xs16, batch, seq, heads, skip_first, tiles_per_program, chunks,
            i_h, i_p,
            MODE, MASKED, HEAD_DIM, PIECES, COUNT, BT, 1, PARTS, False, TOGETHER,
            TMA, Z_PARTS, UPCAST, STAGES,
        )  # fmt: skip
    else:
        are_finite = stream_tokens(
            p_x, p_blocks, p_scale + i_h, partial, vector_partial, norms, valid, last_index, token_scale, token_ratio,
            stride_xb16, stride_xs16, batch, seq, heads, skip_first, tiles_per_program, chunks,
            i_h, i_p,
            MODE, MASKED, HEAD_DIM, PIECES, COUNT, BT, 2, PARTS, SIDE_BY_SIDE, TOGETHER,
            TMA, Z_PARTS, UPCAST, EXACT_STAGES,
        )  # fmt: skip

    if VECTORS:
        if MODE != LAST:
            if are_finite == 0:
                sum_finite_tokens(
                    p_x, p_blocks, p_scale + i_h, vector_partial, valid, stride_xb16, stride_xs16, batch, seq, heads,
                    skip_first, tiles_per_program, i_h, i_p,
                    HEAD_DIM, PIECES, COUNT, BT, PARTS, SIDE_BY_SIDE, TOGETHER, Z_PARTS, UPCAST,
                )  # fmt: skip
        # Of each head the program that comes last merges it: one that did so for all heads would be waited for.
        if arrived_last(p_head_tickets + i_h, programs):
            row = entry(row_table, i_l, SIZE) // SLOT
            merge_vectors(
                vector_partial + i_h * (VECTOR_HEADER + HEAD_DIM), heads * (VECTOR_HEADER + HEAD_DIM), programs,
                vectors + (row.to(tl.int64) * vector_heads + i_h) * vector_width, HEAD_DIM, VP,
            )  # fmt: skip

    if MODE != TOKEN:
        if arrived_last(p_ticket, tl.num_programs(0)):
            row = entry(row_table, i_l, SIZE) // SLOT
            COUNTED: tl.constexpr = MODE == LAST or valid is not None
            merge_samples(
                partial, state, row, batch, heads, chunks, tl.cdiv(seq, BT) if MODE == ALL else tiles_per_program,
                tiles_per_program, tl.maximum(seq - skip_first, 0), state_rows, state_heads, COUNTED, RATIO, WIDE, HP, BB,
            )  # fmt: skip


@triton.jit
def store_moments(p, moments, COUNT: tl.constexpr, HP: tl.constexpr):
    """Store moments as [COUNT, PLANES, HP]."""
    p_out = p + (tl.arange(0, COUNT)[:, None] * PLANES) * HP + tl.arange(0, HP)[None, :]
    for plane in tl.static_range(PLANES):
        tl.store(p_out + plane * HP, moments[plane])


@triton.jit
def merge_moments(
    partial,
    programs,
    state,
    row,
    heads,
    state_rows,
    state_heads,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,  # elements from the moments of one program to those of the next
    HP: tl.constexpr,
    BP: tl.constexpr,
):
    """Merge the moments that the programs stored into COUNT metrics of the state, from FIRST on."""
    o_partial = tl.arange(0, COUNT)[:, None, None] * (PLANES * HP) + tl.arange(0, HP)[None, None, :]
    moments = no_moments(COUNT, HP)
    for i in range(0, programs, BP):
        o_p = i + tl.arange(0, BP)[None, :, None]
        m = (o_p < programs) & (o_partial >= 0)
        p = partial + o_p * PART + o_partial
        parts = combine(
            tl.load(p, mask=m, other=0.0, cache_modifier=".cg"),
            tl.load(p + HP, mask=m, other=0.0, cache_modifier=".cg"),
            tl.load(p + 2 * HP, mask=m, other=0.0, cache_modifier=".cg"),
            tl.load(p + 3 * HP, mask=m, other=0.0, cache_modifier=".cg"),
            tl.load(p + 4 * HP, mask=m, other=float("inf"), cache_modifier=".cg"),
            tl.load(p + 5 * HP, mask=m, other=-float("inf"), cache_modifier=".cg"),
        )
        moments = merged(moments, parts)
    p_state, m_state, stride_plane = state_pointers(
        state, row, heads, state_rows, state_heads, FIRST, COUNT, WIDE, HP
    )
    old, old_count, old_bad = read_state(p_state, stride_plane, m_state)
    write_state(p_state, stride_plane, m_state, old, moments, old_count, old_bad)


@triton.jit(do_not_specialize=["tokens", "seq", "heads", "state_rows", "state_heads", "skip_first"])
def token_moments_kernel(
    factor_table,
    row_table,
    state,
    partial,  # float64 [layers, programs, METRICS, PLANES, HP]; with token_ratio RATIO_METRICS more
    norms,  # float32 [layers, 2, heads, tokens]
    valid,  # uint8 [tokens]
    token_ratio,  # float32 [layers, tokens]
    tokens,
    seq,
    heads,
    state_rows,
    state_heads,
    skip_first,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    HP: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,  # programs in a block of the merge
):
    """Moments of samples that are tokens, from their norms. Grid: (programs; layers)."""
    i_p = tl.program_id(0)
    i_l = tl.program_id(1)
    programs = tl.num_programs(0)
    RATIO: tl.constexpr = token_ratio is not None
    PART: tl.constexpr = (METRICS + RATIO_METRICS if RATIO else METRICS) * PLANES * HP
    o_h = tl.arange(0, HP)[None, None, :]
    m_h = o_h < heads
    o_metric = tl.arange(0, METRICS)[:, None, None]
    norms += i_l.to(tl.int64) * 2 * heads * tokens
    partial += i_l.to(tl.int64) * programs * PART
    p_norms = norms + (o_metric % 2) * (heads.to(tl.int64) * tokens) + o_h.to(tl.int64) * tokens
    per_head = 1.0 / heads.to(tl.float64)
    kept = no_samples(METRICS, BT, HP)
    if RATIO:
        token_ratio += i_l.to(tl.int64) * tokens
        p_contributions = norms + heads.to(tl.int64) * tokens + o_h.to(tl.int64) * tokens
        square = tl.arange(0, RATIO_METRICS)[:, None, None] == 1
        ratio_kept = no_samples(RATIO_METRICS, BT, HP)
    for i_t in range(i_p * BT, tokens, programs * BT):
        o_t = i_t + tl.arange(0, BT)[None, :, None]
        real = o_t < tokens
        m = real & m_h & (o_metric >= 0)
        if RATIO:
            ratio = tl.load(token_ratio + o_t, mask=real, other=0.0).to(tl.float64)
            ratio = ratio * tl.load(p_contributions + o_t, mask=real & m_h, other=0.0).to(tl.float64)
        if valid is not None:
            real = real & (tl.load(valid + o_t, mask=real, other=0) != 0)
        else:
            real = real & (o_t % seq >= skip_first)
        values = tl.load(p_norms + o_t, mask=m, other=0.0).to(tl.float64)
        kept = add_samples(kept, with_relatives(values, m_h, per_head), real, m_h)
        if RATIO:
            ratio_kept = add_samples(ratio_kept, tl.where(square, ratio * ratio, ratio), real, m_h)
    store_moments(partial + i_p * PART, sample_moments(kept), METRICS, HP)
    if RATIO:
        p_ratio = partial + METRICS * PLANES * HP
        store_moments(p_ratio + i_p * PART, sample_moments(ratio_kept), RATIO_METRICS, HP)

    p_ticket = entry(factor_table, i_l, SIZE).to(tl.pointer_type(tl.int32))
    if arrived_last(p_ticket, programs):
        row = entry(row_table, i_l, SIZE) // SLOT
        merge_moments(
            partial, programs, state, row, heads, state_rows, state_heads, 0, METRICS, WIDE, PART, HP, BP
        )
        if RATIO:
            merge_moments(
                p_ratio, programs, state, row, heads, state_rows, state_heads, METRICS, RATIO_METRICS, WIDE,
                PART, HP, BP,
            )  # fmt: skip
