"""What every layer of a model knows, measured without training.

`survey` runs the model, `scores` has the measures, `report` keeps and shows them, `proposal` reads settings off them,
`inspection` is where it begins; `draw` makes pictures, which nothing else needs.
"""
