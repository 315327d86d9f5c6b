"""A small simulation that ends in a tenth of a second, and ways to change it."""

from copy import deepcopy

SMALL = {
    "model": {
        "max_model_len": 2048,
        "config": {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
    },
    "hardware": {"device": "L20", "stage_link": "pcie-4-x16"},
    "pipeline": {"num_stages": 2},
    "workload": {"arrivals": 20, "lengths": {"prompt": 100, "output": 20}, "num_requests": 40},
}


def changed(changes, config=SMALL):
    """The same with other values, by dotted key; a value of `...` leaves the key out."""
    config = deepcopy(config)
    for path, value in changes.items():
        part = config
        *parents, key = path.split(".")
        for parent in parents:
            part = part.setdefault(parent, {})
        if value is ...:
            part.pop(key, None)
        else:
            part[key] = deepcopy(value)
    return config
