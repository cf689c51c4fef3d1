"""Continues a prompt with an exported model, by transformers alone: python generate.py DIRECTORY --prompt TEXT."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("directory")
parser.add_argument("--prompt", default="The function returns")
parser.add_argument("--max-new-tokens", type=int, default=40)
arguments = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(arguments.directory)
tokenizer = AutoTokenizer.from_pretrained(arguments.directory)
inputs = tokenizer(arguments.prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
print(type(model).__name__, f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
print(tokenizer.decode(output[0], skip_special_tokens=True))
