"""Tools on layers and models: conversion, gradient check, explanation, measurement."""
