"""Side-by-side measurements against peers. They print numbers and assert nothing about time."""
