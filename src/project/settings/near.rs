//! What somebody may have meant who mistyped.

/// An unknown key as errors show it. What cannot be one may be a value with a secret in it, behind a colon without a blank: it is not repeated.
pub(super) fn shown(key: &str) -> String {
    let plain = (1..=32).contains(&key.len()) && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if plain { format!("{key:?}") } else { "such a key (it is not shown: is a blank missing behind a colon?)".to_owned() }
}

/// `, did you mean "x"?` for a near miss, else nothing.
pub(super) fn did_you_mean<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> String {
    let near = known
        .map(|name| (distance(given, name), name))
        .min()
        .filter(|(steps, name)| *steps <= (name.len() / 3).max(2) && steps + 2 <= name.len());
    near.map_or_else(String::new, |(_, name)| format!(" (did you mean {name:?}?)"))
}

/// How many letters must be added, removed or changed to get from one text to the other, case aside; bounded input only.
pub(in crate::project) fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.to_lowercase().chars().take(64).collect();
    let b: Vec<char> = b.to_lowercase().chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.iter().enumerate() {
        let mut diagonal = i;
        let mut last = i + 1;
        let mut next = vec![last];
        for (right, above) in b.iter().zip(row.iter().skip(1)) {
            last = (diagonal + usize::from(left != right)).min(above + 1).min(last + 1);
            diagonal = *above;
            next.push(last);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}
