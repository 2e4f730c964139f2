//! Text that grows token by token: characters whose bytes are spread over several tokens, and
//! strings that end it.

use crate::data::Tokenizer;
use crate::error::Result;

/// The text of a completion while its tokens come in.
#[derive(Clone, Debug, Default)]
pub struct TextStream {
    tokens: Vec<u32>,
    /// Tokens from here on are decoded again each time: some decoders look at what comes before.
    context: usize,
    /// Tokens before this are in `text`.
    decoded: usize,
    text: String,
    /// How much of `text` was handed out by [`Self::take`].
    taken: usize,
}

impl TextStream {
    /// Adds a token and returns whether the text now holds one of `stops`; it then ends before
    /// the first of them.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32, stops: &[String]) -> Result<bool> {
        self.tokens.push(token);
        self.decode(tokenizer, false)?;
        Ok(self.cut(stops))
    }

    /// Adds what was held back in the hope of more bytes of a character, once no token follows.
    pub fn finish(&mut self, tokenizer: &Tokenizer, stops: &[String]) -> Result<bool> {
        self.decode(tokenizer, true)?;
        Ok(self.cut(stops))
    }

    /// All tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens and text.
    pub fn into_parts(self) -> (Vec<u32>, String) {
        (self.tokens, self.text)
    }

    /// What is new since the last call, without an end that may become one of `stops`.
    pub fn take(&mut self, stops: &[String], is_finished: bool) -> &str {
        let open = match is_finished {
            true => 0,
            false => stops
                .iter()
                .map(|stop| open_end(&self.text, stop))
                .max()
                .unwrap_or(0),
        };
        let end = (self.text.len() - open).max(self.taken);
        let new = &self.text[self.taken..end];
        self.taken = end;
        new
    }

    fn decode(&mut self, tokenizer: &Tokenizer, is_last: bool) -> Result<()> {
        const INCOMPLETE: char = '\u{fffd}';
        let before = tokenizer.decode(&self.tokens[self.context..self.decoded], true)?;
        let with = tokenizer.decode(&self.tokens[self.context..], true)?;
        if with.ends_with(INCOMPLETE) && !is_last {
            return Ok(());
        }
        self.text
            .push_str(with.get(before.len()..).unwrap_or_default());
        self.context = self.decoded;
        self.decoded = self.tokens.len();
        Ok(())
    }

    /// Ends the text before the first stop string in it.
    fn cut(&mut self, stops: &[String]) -> bool {
        // What was handed out holds none and ends in the beginning of none.
        let start = self.taken;
        let found = stops
            .iter()
            .filter_map(|stop| self.text[start..].find(stop.as_str()));
        match found.min() {
            Some(at) => {
                self.text.truncate(start + at);
                true
            }
            None => false,
        }
    }
}

/// The length of the longest end of `text` that `stop` begins with.
fn open_end(text: &str, stop: &str) -> usize {
    let mut ends: Vec<usize> = stop.char_indices().skip(1).map(|(i, _)| i).collect();
    ends.reverse();
    let found = ends.into_iter().find(|&n| text.ends_with(&stop[..n]));
    found.unwrap_or(0)
}
