"""What tests share: oracles, models and files made up for them, and commands as a user gives them."""
