"""NP weights: conversion of a base model, files, resuming, validation of checkpoints."""
