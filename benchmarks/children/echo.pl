# Answers each request at once. As little as a child can do.
$| = 1;
while (<STDIN>) {
    /"id":\s?"([^"]+)"/;
    print qq({"id":"$1","status":"ok"}\n);
}
