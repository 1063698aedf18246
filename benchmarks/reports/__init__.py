"""What is made of rows: tables, pictures, the README's table, the headline file; and the roofline in words."""
