"""Synthetic tasks: flip-flop, selective copy and counting, as pure samplers that run on the device.

A `Task` is an immutable value. `task.sample(key, batch_size)` is a pure function of its key with static shapes, so a
training run can be one compiled program that includes its data. Nothing is written to or read from disk.

    tokens [B, T] int32      the input of the model
    targets [B, T] int32     the token to predict at each position, which is the next token
    weights [B, T] float32   1 where the task defines an answer; 0 elsewhere, which loss and error ignore

B is the batch size and T `task.length`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import check, check_at_least

MAX_VALUE = 10  # counting: the largest value that a variable may take
MIN_OPERATIONS = 3  # counting: the shortest program


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, so that it can be a static argument
class Task:
    """Describes a synthetic task: a pure sampler, its vocabulary and its test sets.

    Attributes:
      name: short name; for a variant, it includes the setting ("flip_flop_dense").
      length: T, the length of every sequence.
      words: the text of each token id; its length is the vocabulary size.
      sample: `sample(key, batch_size) -> (tokens, targets, weights)`, described at the top of this file. `batch_size` is
        static: compile with `jax.jit(task.sample, static_argnums=1)`.
      variants: the out-of-distribution test sets of the paper by name, each a Task with the same vocabulary.
      pad_token: id of the token that pads short sequences at the end. None if every sequence is full.
    """

    name: str
    length: int
    words: tuple[str, ...] = field(repr=False)
    sample: Callable[[jax.Array, int], tuple[jax.Array, jax.Array, jax.Array]] = field(repr=False)
    variants: dict[str, "Task"] = field(default_factory=dict, repr=False)
    pad_token: int | None = None

    @property
    def vocab_size(self) -> int:
        """Returns V, the number of token ids."""
        return len(self.words)

    def batch(self, key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
        """Samples a batch, including the segment ids and positions that a model takes.

        Each row is one segment; padding has segment 0.

        Returns:
          A dict of tokens, targets, segment_ids, positions (int32 [B, T]) and weights (float32 [B, T]).
        """
        tokens, targets, weights = self.sample(key, batch_size)
        real = jnp.ones_like(tokens) if self.pad_token is None else (tokens != self.pad_token).astype(jnp.int32)
        positions = jnp.arange(self.length, dtype=jnp.int32)[None, :] * real
        return {"tokens": tokens, "targets": targets, "weights": weights, "segment_ids": real, "positions": positions}

    def detokenize(self, tokens) -> str:
        """Converts one row of token ids [T] to text, with words separated by spaces and padding left out.

        Raises:
          ValueError: `tokens` is not one row of ids of this task.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 1:
            raise ValueError(f"tokens must be one row [T], got shape {tokens.shape}; pass one row of a batch, tokens[i]")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"tokens must be ids of {self.name}, 0 to {self.vocab_size - 1}, got {tokens.min()} to {tokens.max()}")
        return " ".join(self.words[token] for token in tokens if token != self.pad_token)


def _predict_next(tokens: jax.Array, answered: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (tokens, targets, weights) for strings [B, T]; `answered` [B, T] marks positions whose next token is an answer."""
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))  # the last token has no target: its weight is 0
    weights = answered.astype(jnp.float32).at[:, -1].set(0.0)
    return tokens.astype(jnp.int32), targets.astype(jnp.int32), weights


# ---------------------------------------------------------------------------------------------------------- flip-flop

WRITE, READ, IGNORE = 0, 1, 2


def flip_flop(length: int = 512, ignore_probability: float = 0.8) -> Task:
    """Returns the flip-flop task FFL(T, p_i): remember the last written bit through any number of distractors.

    A string is T / 2 pairs of an instruction and a bit. The first instruction is w (write) and the last is r (read). The
    others are i (ignore) with probability p_i, else w or r with equal probability. The bit after r is the last one
    written; every other bit is uniformly random. Loss and error count only the bits after r, including the last bit of
    the string. Token ids: w 0, r 1, i 2, bit 0 is 3, bit 1 is 4. `tokens` is the full string.

    Args:
      length: T, the number of tokens in a string; even, at least 4.
      ignore_probability: p_i, from 0 to 1. The paper trains at 0.8; `variants` contains its test sets "dense" (0.1) and
        "sparse" (0.98).

    Raises:
      ValueError: an argument is out of range.

    Liu, Ash, Goel, Krishnamurthy and Zhang 2023, arXiv:2306.00946.
    """
    task = _flip_flop("flip_flop", length, ignore_probability)
    dense = _flip_flop("flip_flop_dense", length, 0.1)
    sparse = _flip_flop("flip_flop_sparse", length, 0.98)
    return replace(task, variants={"dense": dense, "sparse": sparse})


def _flip_flop(name: str, length: int, ignore_probability: float) -> Task:
    check_at_least("length", length, 4)
    if length % 2:
        raise ValueError(f"length must be even, because a string is pairs of an instruction and a bit, got {length}")
    check("ignore_probability", ignore_probability, float, least=0, most=1)
    pairs = length // 2

    def sample(key: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        instruction_key, kind_key, bit_key = jax.random.split(key, 3)
        shape = (batch_size, pairs)
        ignored = jax.random.bernoulli(instruction_key, ignore_probability, shape)
        written = jax.random.bernoulli(kind_key, 0.5, shape)
        instructions = jnp.where(ignored, IGNORE, jnp.where(written, WRITE, READ))
        instructions = instructions.at[:, 0].set(WRITE).at[:, -1].set(READ)
        bits = jax.random.bernoulli(bit_key, 0.5, shape).astype(jnp.int32)
        last_write = jax.lax.cummax(jnp.where(instructions == WRITE, jnp.arange(pairs)[None, :], 0), axis=1)
        remembered = jnp.take_along_axis(bits, last_write, axis=1)
        bits = jnp.where(instructions == READ, remembered, bits)
        tokens = jnp.stack([instructions, bits + 3], axis=-1).reshape(batch_size, length)
        return _predict_next(tokens, tokens == READ)

    return Task(name, length, ("w", "r", "i", "0", "1"), sample)


# ----------------------------------------------------------------------------------------------------- selective copy

BLANK = 0


def selective_copy(num_tokens: int = 256, num_blanks: int = 256, vocab_size: int = 16) -> Task:
    """Returns the selective copy task: repeat the letters of a string in order and leave out its blanks.

    A row has `num_tokens` letters drawn uniformly, with `num_blanks` blanks among them at uniformly drawn positions; then
    a separator; then the letters again, without the last one, which has no next token: T = 2 num_tokens + num_blanks.
    Loss and error count the copied letters. Token ids: blank 0, letters 1 to V - 2, separator V - 1.

    The paper specifies 16 tokens and comes without code. Counting the blank and the separator among the 16 follows the
    layout of Gu and Dao's task (arXiv:2312.00752). The paper reports errors of 100 %, more than random letters would give,
    so it must count a string as wrong if any letter is wrong.

    Args:
      num_tokens: number of letters to copy.
      num_blanks: number of blanks among them. The paper trains with 256; `variants` contains its test sets "dense" (half
        of num_blanks) and "sparse" (twice num_blanks): 128 and 512 for 256. They differ from this task in length.
      vocab_size: V, at least 3.

    Raises:
      ValueError: an argument is out of range.

    Golovneva, Wang, Weston and Sukhbaatar 2024, arXiv:2405.18719.
    """
    task = _selective_copy("selective_copy", num_tokens, num_blanks, vocab_size)
    dense = _selective_copy("selective_copy_dense", num_tokens, num_blanks // 2, vocab_size)
    sparse = _selective_copy("selective_copy_sparse", num_tokens, num_blanks * 2, vocab_size)
    return replace(task, variants={"dense": dense, "sparse": sparse})


def _selective_copy(name: str, num_tokens: int, num_blanks: int, vocab_size: int) -> Task:
    check_at_least("num_tokens", num_tokens, 1)
    check_at_least("num_blanks", num_blanks, 0)
    check_at_least("vocab_size", vocab_size, 3)
    mixed_length = num_tokens + num_blanks
    separator = vocab_size - 1

    def sample(key: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        letter_key, place_key = jax.random.split(key)
        letters = jax.random.randint(letter_key, (batch_size, num_tokens), 1, separator)
        is_letter = jnp.tile(jnp.arange(mixed_length) < num_tokens, (batch_size, 1))
        is_letter = jax.random.permutation(place_key, is_letter, axis=1, independent=True)
        order = jnp.maximum(jnp.cumsum(is_letter, axis=1) - 1, 0)
        mixed = jnp.where(is_letter, jnp.take_along_axis(letters, order, axis=1), BLANK)
        middle = jnp.full((batch_size, 1), separator, mixed.dtype)
        string = jnp.concatenate([mixed, middle, letters], axis=1).astype(jnp.int32)
        weights = jnp.tile(jnp.arange(mixed_length + num_tokens) >= mixed_length, (batch_size, 1))
        return string[:, :-1], string[:, 1:], weights.astype(jnp.float32)

    letters = tuple(chr(ord("A") + i) if i < 26 else f"t{i}" for i in range(vocab_size - 2))
    return Task(name, mixed_length + num_tokens, ("_", *letters, "|"), sample)


# ----------------------------------------------------------------------------------------------------------- counting

PAD, PASS, PLUS, EQUALS, END, PRINT, ZERO = 0, 1, 2, 3, 4, 5, 6
_FIRST_VARIABLE = ZERO + MAX_VALUE + 1


def counting(
    num_variables: int = 1,
    max_operations: int = 512,
    set_weight: float = 1,
    increment_weight: float = 7,
    pass_weight: float = 50,
    length: int = 512,
) -> Task:
    """Returns the counting task: read a program that sets and increments variables, then predict the value of one of them.

    A program has n operations, with n uniform from 3 to `max_operations`, and ends with a question and its answer:

        a = 0 ; pass; a ++; pass; b = 0 ; a ++; print a 2

    The kind of each operation is drawn with the three weights: "pass;" (1 token), "v = 0 ;" for any variable v (4 tokens),
    or "v ++;" for one of the variables that have been set (2 tokens). If an increment is impossible (no variable is set
    yet, or the variable drawn has the value 10), the operation is drawn again, both its kind and its variable. The
    question is about one of the variables that are set, and a program that sets none is drawn again, including its n.

    This sampler produces the same distribution without rejection. It draws each operation from the possible outcomes
    only: pass with weight w_pass, each set with w_set / V, each increment of a variable below 10 with
    w_inc / (number of variables set). Before the first set there are only sets and passes, and the probability of a pass
    is q = w_pass / (w_pass + w_set). A program that sets a variable therefore has n with weight 1 - q^n and its first set
    at operation f <= n with weight q^(f-1).

    A string longer than `length` tokens, including its answer, is truncated at the beginning, as in the released code.
    As a result, some programs lack the set of the variable that they ask about: with 1, 3 and 5 variables these are 0,
    0.146 +- 0.004 and 0.384 +- 0.006 % of a million programs each (+- one standard error). In a sample of 10,000, the size
    of the paper's data, the standard errors are ten times as large, and 0, 0.17 and 0.30 % are not unusual. A shorter
    string is padded at the end. Loss and error count only the answer, which is also the last token of the string.

    Args:
      num_variables: number of variables, 1 to 26; the paper has 1, 3 and 5.
      max_operations: maximum number of operations, at least 3.
      set_weight, increment_weight, pass_weight: relative weights of the operations; set_weight must be above 0.
        `variants` contains the paper's other tests, "pass_100" and "pass_10".
      length: T, at least 3.

    Raises:
      ValueError: an argument is out of range.

    Golovneva, Wang, Weston and Sukhbaatar 2024, arXiv:2405.18719, and their released generator.
    """
    name = f"counting_{num_variables}"
    settings = (num_variables, max_operations, set_weight, increment_weight)
    task = _counting(name, *settings, pass_weight, length)
    variants = {f"pass_{w}": _counting(f"{name}_pass_{w}", *settings, w, length) for w in (100, 10)}
    return replace(task, variants=variants)


def _counting(name, num_variables, max_operations, set_weight, increment_weight, pass_weight, length) -> Task:
    check_at_least("num_variables", num_variables, 1, 26)
    check_at_least("max_operations", max_operations, MIN_OPERATIONS)
    check_at_least("length", length, 3)
    for argument, weight in (("increment_weight", increment_weight), ("pass_weight", pass_weight)):
        check(argument, weight, float, least=0, what="be 0 or a positive number")
    wanted = "a positive number, because the question needs a variable that is set"
    check("set_weight", set_weight, float, above=0, what=f"be {wanted}")

    # Conditioned on at least one set (see the docstring of `counting`), and computed once, in float64.
    no_set_yet = (pass_weight / (pass_weight + set_weight)) ** np.arange(max_operations + 1)
    with np.errstate(divide="ignore"):
        count_logits = jnp.asarray(np.log(1.0 - no_set_yet[MIN_OPERATIONS:]), jnp.float32)
        first_set_logits = jnp.asarray(np.log(no_set_yet[:-1]), jnp.float32)

    def sample(key: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        count_key, first_key, variable_key, outcome_key, question_key = jax.random.split(key, 5)
        num_operations = MIN_OPERATIONS + jax.random.categorical(count_key, count_logits, shape=(batch_size,))
        within = jnp.arange(max_operations)[None, :] < num_operations[:, None]
        first_set = jax.random.categorical(first_key, jnp.where(within, first_set_logits[None, :], -jnp.inf))
        first_variable = jax.random.randint(variable_key, (batch_size,), 0, num_variables)
        uniforms = jax.random.uniform(outcome_key, (max_operations, batch_size), jnp.float32)

        # Outcome 0 is a pass, 1 to V set a variable, V + 1 to 2 V increment one. A value of -1 means not set yet.
        def operate(values, step):
            place, uniform = step
            is_set = values >= 0
            sets = jnp.full(values.shape, set_weight / num_variables, jnp.float32)
            num_set = is_set.sum(1, keepdims=True).astype(jnp.float32)
            increments = increment_weight / jnp.maximum(num_set, 1.0)
            increments = jnp.where(is_set & (values < MAX_VALUE), increments, 0.0)
            passes = jnp.full((batch_size, 1), pass_weight, jnp.float32)
            bounds = jnp.cumsum(jnp.concatenate([passes, sets, increments], axis=1), axis=1)
            drawn = (bounds <= uniform[:, None] * bounds[:, -1:]).sum(1)
            outcome = jnp.where(place < first_set, 0, jnp.where(place == first_set, 1 + first_variable, drawn))
            outcome = jnp.where(place < num_operations, outcome, 0)
            set_now = outcome[:, None] == 1 + variables
            incremented = jnp.where(outcome[:, None] == 1 + num_variables + variables, values + 1, values)
            return jnp.where(set_now, 0, incremented), outcome

        variables = jnp.arange(num_variables)[None, :]
        values = jnp.full((batch_size, num_variables), -1, jnp.int32)
        values, outcomes = jax.lax.scan(operate, values, (jnp.arange(max_operations), uniforms))
        asked = jax.random.categorical(question_key, jnp.where(values >= 0, 0.0, -jnp.inf))
        answer = ZERO + jnp.take_along_axis(values, asked[:, None], axis=1)[:, 0]
        return _write_programs(outcomes.T, within, num_variables, asked, answer, length)

    words = ("<pad>", "pass;", "++;", "=", ";", "print", *map(str, range(MAX_VALUE + 1)))
    words += tuple("abcdefghijklmnopqrstuvwxyz"[:num_variables])
    return Task(name, length, words, sample, pad_token=PAD)


def _write_programs(outcomes, within, num_variables, asked, answer, length):
    """Converts outcomes [B, operations] to tokens, appends question and answer, and truncates on the left to fit T."""
    batch_size = outcomes.shape[0]
    is_pass = outcomes == 0
    is_set = (outcomes >= 1) & (outcomes <= num_variables)
    sizes = jnp.where(within, jnp.where(is_pass, 1, jnp.where(is_set, 4, 2)), 0)
    ends = jnp.cumsum(sizes, axis=1)
    body = ends[:, -1:]
    cut = jnp.maximum(body + 3 - length, 0)  # 3 tokens: print, variable, answer
    variable = _FIRST_VARIABLE + (outcomes - 1) % num_variables
    zeros = jnp.zeros_like(outcomes)
    statement = (jnp.where(is_pass, PASS, variable), jnp.where(is_set, EQUALS, PLUS), zeros + ZERO, zeros + END)
    piece = jnp.arange(len(statement))[None, None, :]
    places = (ends - sizes)[:, :, None] + piece - cut[:, :, None]
    places = jnp.where((piece < sizes[:, :, None]) & (places >= 0), places, length)  # out of bounds: the scatter drops these
    question = jnp.stack([jnp.full_like(answer, PRINT), _FIRST_VARIABLE + asked.astype(answer.dtype), answer], axis=1)

    places = jnp.concatenate([places.reshape(batch_size, -1), body - cut + jnp.arange(3)[None, :]], axis=1)
    statement = jnp.stack(statement, axis=-1).reshape(batch_size, -1).astype(jnp.int32)
    words = jnp.concatenate([statement, question.astype(jnp.int32)], axis=1)
    rows = jnp.arange(batch_size)[:, None]
    tokens = jnp.full((batch_size, length), PAD, jnp.int32).at[rows, places].set(words, mode="drop")
    asked_place = body + 1 - cut  # position of the variable in the question, where the answer is predicted
    return _predict_next(tokens, jnp.arange(length)[None, :] == asked_place)
