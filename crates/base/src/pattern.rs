//! Patterns for tensor names: `*` stands for any run of characters, `?` for one, `[0-3x]` for one
//! of those listed.

/// True where the whole of `name` matches.
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where to go on when a match fails: behind the last `*`, with one more character given to it.
    let mut retry: Option<(usize, usize)> = None;
    loop {
        if pattern.get(p) == Some(&'*') {
            p += 1;
            retry = Some((p, n));
        } else if n == name.len() && p == pattern.len() {
            return true;
        } else if let Some(next) = (n < name.len()).then(|| one(&pattern, p, name[n])).flatten() {
            (p, n) = (next, n + 1);
        } else if let Some((star, taken)) = retry.filter(|(_, taken)| *taken < name.len()) {
            (p, n) = (star, taken + 1);
            retry = Some((star, taken + 1));
        } else {
            return false;
        }
    }
}

/// Matches one character; the position behind the part of the pattern that stands for it.
fn one(pattern: &[char], p: usize, c: char) -> Option<usize> {
    match pattern.get(p)? {
        '?' => Some(p + 1),
        '[' => {
            let len = pattern[p + 1..].iter().position(|&c| c == ']')?;
            let set = &pattern[p + 1..p + 1 + len];
            let mut i = 0;
            while i < set.len() {
                let (low, high, used) = match set[i..] {
                    [low, '-', high, ..] => (low, high, 3),
                    _ => (set[i], set[i], 1),
                };
                if (low..=high).contains(&c) {
                    return Some(p + len + 2);
                }
                i += used;
            }
            None
        }
        &literal => (literal == c).then_some(p + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[track_caller]
    fn check(pattern: &str, name: &str, expected: bool) {
        assert_eq!(matches(pattern, name), expected, "`{pattern}` on `{name}`");
    }

    #[test]
    fn patterns() {
        check("blk.*.ffn_down.weight", "blk.17.ffn_down.weight", true);
        check("blk.*.ffn_down.weight", "blk.17.ffn_down.bias", false);
        check("blk.?.attn_v.weight", "blk.17.attn_v.weight", false);
        check("blk.?.attn_v.weight", "blk.7.attn_v.weight", true);
        check("blk.[0-3].*", "blk.2.attn_v.weight", true);
        check("blk.[0-3].*", "blk.4.attn_v.weight", false);
        check("blk.[07].*", "blk.7.attn_v.weight", true);
        check("*", "", true);
        check("", "a", false);
        check("", "", true);
        check("a*b*c", "a-b-b-c", true);
        check("a*b*c", "a-b-b-", false);
        check("output.weight", "output.weight", true);
        check("output.weight", "outputxweight", false);
        check("a[", "a[", false);
        check("*a*a*a*a*a*a*a*a*b", &"a".repeat(300), false);
    }
}
