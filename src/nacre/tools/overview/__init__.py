"""The visual overview of all layers. Read scenes.py (which calls are drawn), connections.py (who depends on whom, found
by running the layer), picture.py (the drawing), usage.py (where a layer is used) and page.py (the page and the files).
"""
