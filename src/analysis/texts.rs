use crate::data::Tokenizer;
use crate::error::Result;

/// The marks of reasoning in a text.
pub const MARKS: [&str; 2] = ["<think>", "</think>"];

/// A text as a model reads it, with the tokens that belong to a mark.
#[derive(Clone, Debug)]
pub struct MarkedText {
    /// Token ids. Before those of the text stands the tokenizer's BOS token or, where it has
    /// none, the EOS token that precedes a text in training.
    pub ids: Vec<u32>,
    /// Of every token, whether a part of it lies in a mark.
    pub marked: Vec<bool>,
}

impl MarkedText {
    /// Tokenises a text; what is beyond `longest` tokens is left out.
    ///
    /// # Errors
    /// When the tokenizer cannot represent the text.
    pub fn new(tokenizer: &Tokenizer, text: &str, longest: usize) -> Result<Self> {
        let spans: Vec<(usize, usize)> = MARKS
            .iter()
            .flat_map(|mark| text.match_indices(mark))
            .map(|(start, mark)| (start, start + mark.len()))
            .collect();
        let inside = |(start, end): (usize, usize)| {
            spans
                .iter()
                .any(|&(first, last)| start < last && first < end)
        };
        let mut ids = vec![tokenizer.bos().unwrap_or(tokenizer.eos_id())];
        let mut marked = vec![false];
        for (id, range) in tokenizer
            .encode_located(text)?
            .into_iter()
            .take(longest - 1)
        {
            ids.push(id);
            marked.push(inside(range));
        }
        Ok(Self { ids, marked })
    }
}
