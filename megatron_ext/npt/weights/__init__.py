"""NP weights: conversion, files, resuming, validation."""
