#!/usr/bin/perl
# Counts the words and sentences of text files. A warm child: it reads one request per line from stdin
# and writes one reply per line to stdout, until stdin ends. It uses no module: any perl can run it.
use strict;
use warnings;

$| = 1;    # flush after each reply

while (my $line = <STDIN>) {
    utf8::decode($line);
    my $request = parse_json($line);
    my $reply = eval { {status => 'ok', result => text_stats($request->{payload}{args}[0])} };
    if (!$reply) {
        chomp(my $message = $@);
        $reply = {status => 'error', type => 'TextError', message => $message};
    }
    $reply->{id} = $request->{id};
    print to_json($reply), "\n";
}

sub text_stats {
    my ($path) = @_;
    my $text = read_text($path);
    my ($words, $longest, %seen) = (0, '');
    while ($text =~ /(\w+(?:['\x{2019}-]\w+)*)/g) {
        my $word = lc $1;
        $words++;
        $seen{$word}++;
        $longest = $word if length $word > length $longest;
    }
    my $distinct = keys %seen;
    my @common = sort { $seen{$b} <=> $seen{$a} || $a cmp $b } keys %seen;
    my $sentences = () = $text =~ /[.!?]+(?=\s|\z)/g;
    $sentences = 1 if !$sentences && $words;
    return {
        pid => \$$,
        child => 'perl',
        characters => \length $text,
        words => \$words,
        distinct_words => \$distinct,
        sentences => \$sentences,
        words_per_sentence => \($sentences ? $words / $sentences : 0),
        longest_word => $longest,
        common_words => [grep { defined } @common[0 .. 4]],
    };
}

sub read_text {
    my ($path) = @_;
    die "the argument must be the path of a file\n" if !defined $path || ref $path;
    my $name = $path;
    utf8::encode($name);
    open my $file, '<:raw', $name or die "can't read $path: $!\n";
    local $/;
    my $text = <$file>;
    defined $text or die "can't read $path: $!\n";
    utf8::decode($text);    # text that is not UTF-8 stays as it is, and counts as Latin-1
    return $text;
}

# -- Read and write JSON. Objects are hashes, arrays are arrays; true, false and null are 1, 0, undef.
# To write a number, pass a reference: perl does not tell "7" from 7.

sub parse_json {
    local $_ = shift;
    my $value = parse_value();
    /\G\s*\z/gc or die "text after the JSON value\n";
    return $value;
}

sub parse_value {
    /\G\s*/gc;
    return parse_object() if /\G\{/gc;
    return parse_array() if /\G\[/gc;
    return parse_string() if /\G"/gc;
    return $1 + 0 if /\G(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)/gc;
    return 1 if /\Gtrue/gc;
    return 0 if /\Gfalse/gc;
    return undef if /\Gnull/gc;
    die 'not JSON at character ' . (pos || 0) . "\n";
}

sub parse_object {
    my %object;
    return \%object if /\G\s*\}/gc;
    while (1) {
        /\G\s*"/gc or die "a key is missing\n";
        my $key = parse_string();
        /\G\s*:/gc or die "a colon is missing\n";
        $object{$key} = parse_value();
        next if /\G\s*,/gc;
        return \%object if /\G\s*\}/gc;
        die "an object does not end\n";
    }
}

sub parse_array {
    my @array;
    return \@array if /\G\s*\]/gc;
    while (1) {
        push @array, scalar parse_value();
        next if /\G\s*,/gc;
        return \@array if /\G\s*\]/gc;
        die "an array does not end\n";
    }
}

sub parse_string {
    my %escaped = (b => "\b", f => "\f", n => "\n", r => "\r", t => "\t");
    my $string = '';
    while (1) {
        if (/\G([^"\\]+)/gc) { $string .= $1 }
        elsif (/\G"/gc) { return $string }
        elsif (/\G\\u([dD][89abAB]..)\\u([dD][c-fC-F]..)/gc) {    # a surrogate pair: one character
            $string .= chr(0x10000 + ((hex($1) & 0x3ff) << 10) + (hex($2) & 0x3ff));
        }
        elsif (/\G\\u([0-9a-fA-F]{4})/gc) { $string .= chr hex $1 }
        elsif (/\G\\(.)/gc) { $string .= exists $escaped{$1} ? $escaped{$1} : $1 }
        else { die "a string does not end\n" }
    }
}

sub to_json {
    my ($value) = @_;
    return 'null' if !defined $value;
    if (ref $value eq 'HASH') {
        return '{' . join(',', map { quoted($_) . ':' . to_json($value->{$_}) } sort keys %$value) . '}';
    }
    return '[' . join(',', map { to_json($_) } @$value) . ']' if ref $value eq 'ARRAY';
    return ref $value eq 'SCALAR' ? $$value : quoted($value);
}

sub quoted {
    my ($string) = @_;
    $string =~ s/(["\\])/\\$1/g;
    $string =~ s/([^\x20-\x7e])/escaped(ord $1)/ge;
    return "\"$string\"";
}

sub escaped {
    my ($code) = @_;
    return sprintf '\\u%04x', $code if $code < 0x10000;
    $code -= 0x10000;
    return sprintf '\\u%04x\\u%04x', 0xd800 + ($code >> 10), 0xdc00 + ($code & 0x3ff);
}
