"""Words and map vectors of places, from where they are public: OpenStreetMap, Wikipedia, gazetteers, and rules that write sentences and questions.

Everything that is collected carries its licence, and every collection goes on where it was interrupted.
"""
