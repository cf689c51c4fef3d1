"""Reads the flags that choose the layers with a sliding window and the layers with rotary positions.

The values are spelled as in Megatron-LM. With `--window-size 511,0` a token attends to 511 earlier tokens, to itself,
and to no later token. `--window-attn-skip-freq` and `--no-rope-freq` take a number N or a list. With N, every Nth
layer has no window, or no rotary positions (layers are counted from 1). A list has one entry per layer: 1 for a layer
with a window, or without rotary positions, otherwise 0. Lists may be added and repeated, as in ([1]*5+[0])*2.
"""

import ast


def window_tokens(size: str) -> int:
    """Converts a value of --window-size to the number of tokens that a query attends to, including its own token.

    Raises:
        ValueError: the value is not of the form N,0, where N is the number of earlier tokens.
    """
    parts = size.strip().strip("()").split(",")
    numbers = [part.strip() for part in parts]
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers) or int(numbers[1]) != 0:
        raise ValueError(
            f"--window-size {size}: must be two numbers such as 511,0: the number of earlier tokens "
            "that a token attends to, and 0 for later ones"
        )
    return int(numbers[0]) + 1


def windowed_layers(skip: str | None, num_layers: int) -> tuple[bool, ...]:
    """Converts a value of --window-attn-skip-freq to one boolean per layer: True if the layer has a window.

    Raises:
        ValueError: the value is neither a number of at least 1 nor a list of one 0 or 1 per layer.
    """
    if skip is None:
        return (True,) * num_layers
    value = _number_or_list("--window-attn-skip-freq", skip, num_layers)
    if isinstance(value, int):
        return tuple(not is_last for is_last in _every(value, num_layers))
    return tuple(entry == 1 for entry in value)


def layers_without_rotary(frequency: str | None, num_layers: int) -> tuple[bool, ...]:
    """Converts a value of --no-rope-freq to one boolean per layer: True if the layer has no rotary positions.

    Raises:
        ValueError: as in `windowed_layers`.
    """
    if frequency is None:
        return (False,) * num_layers
    value = _number_or_list("--no-rope-freq", frequency, num_layers)
    if isinstance(value, int):
        return _every(value, num_layers)
    return tuple(entry == 1 for entry in value)


def _every(number: int, num_layers: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % number == 0 for layer in range(num_layers))


def _number_or_list(flag: str, text: str, num_layers: int) -> int | list[int]:
    wanted = f"must be a number of at least 1, or a list of {num_layers} zeros and ones such as ([1]*5+[0])*2"
    value = _read(text, num_layers)
    if isinstance(value, int) and value >= 1:
        return value
    if isinstance(value, list) and len(value) == num_layers and set(value) <= {0, 1}:
        return [int(entry) for entry in value]
    raise ValueError(f"{flag} {text}: {wanted}")


def entries_of(text: str, longest: int) -> list[int] | None:
    """Returns the numbers in a list spelled as for --window-attn-skip-freq; None if `text` is not such a list.

    Args:
        text: the list, such as [6144]*15+[12288]*20.
        longest: largest number of entries.
    """
    value = _read(text, longest)
    if not isinstance(value, list):
        return None
    whole = [entry for entry in value if isinstance(entry, int)]
    return whole if len(whole) == len(value) else None


def skip_frequency(layers: tuple[bool, ...]) -> str | None:
    """Returns the shortest value of --window-attn-skip-freq for the given layers; None if all have a window."""
    if all(layers):
        return None
    return _shortest(tuple(not has_window for has_window in layers), layers)


def no_rope_frequency(layers: tuple[bool, ...]) -> str | None:
    """Returns the shortest value of --no-rope-freq for the layers without rotary positions; None if all layers have
    them.
    """
    if not any(layers):
        return None
    return _shortest(layers, layers)


def _shortest(chosen: tuple[bool, ...], listed: tuple[bool, ...]) -> str:
    """Returns N if every Nth layer and no other is chosen, otherwise a list."""
    first = chosen.index(True) + 1
    if chosen == _every(first, len(chosen)):
        return str(first)
    return "[" + ",".join(str(int(entry)) for entry in listed) + "]"


def shares_of(text: str, num_layers: int) -> tuple[float, ...] | None:
    """Returns one number per layer, from a single number or from a list such as [0.95]*10+[0]*25.

    Returns None if the text is neither, or if the list does not have one entry per layer.
    """
    value = _read(text, num_layers)
    if isinstance(value, list):
        return tuple(value) if len(value) == num_layers else None
    return None if value is None else (value,) * num_layers


def _read(text: str, longest: int) -> float | list[float] | None:
    """Returns a number, or a list of at most `longest` numbers; None if the text is neither."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, longest)
    except (SyntaxError, ValueError):
        return None


def _value(node: ast.expr, longest: int) -> float | list[float]:
    """Computes a number, a list of numbers, a sum of lists, or a list times a number."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        assert isinstance(node.value, int | float)
        return node.value
    if isinstance(node, ast.List):
        entries = [_value(entry, longest) for entry in node.elts]
        if not any(isinstance(entry, list) for entry in entries):
            return [entry for entry in entries if not isinstance(entry, list)]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, longest), _value(node.right, longest)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if not isinstance(node.op, ast.Mult) or not isinstance(left, list) or not isinstance(right, int):
            raise ValueError
        if len(left) * right <= longest:
            return left * right
    raise ValueError
